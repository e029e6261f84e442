"use strict";
const table = new DataTable("#board", {
  paging: false,
  order: [],
  autoWidth: false,
  language: { search: "Filter", info: "_TOTAL_ rows", infoFiltered: "of _MAX_", infoEmpty: "no row", zeroRecords: "No row has that." },
  layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null, top: "search", bottom: "info" },
});
for (const [id, name] of [["#filter", ".dt-search"], ["#count", ".dt-info"]]) {
  document.querySelector(id).append(document.querySelector(name));
}
for (const id of ["causal", "tokenizer"]) {
  const chosen = document.getElementById(id);
  const column = [...document.querySelectorAll("#board thead th")].findIndex((th) => th.dataset.name === id);
  chosen.addEventListener("change", () => {
    const value = chosen.value;
    // a causal cell goes on with how that is known
    const is = (text) => (id === "causal" ? text.split(" ")[0] : text) === value;
    table.column(column).search(value ? is : "").draw();
  });
  chosen.dispatchEvent(new Event("change")); // a browser that goes back keeps what was chosen
}
