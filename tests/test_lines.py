"""tools/lines.py and tools/logs.py: every format of a line, in snippets made here, and all logs of the challenge's records where they are at hand."""

import math
import random
import statistics
import time

import pytest
from conftest import PARITY

from tools import report
from tools.lines import LINES, STAGE_TABLE, STAGES, Reading, take
from tools.logs import Log, LogError, NoLog, read_log, read_logs
from tools.tables import NAMES, cells

RECORDS = PARITY / "records_logs"
needs_records = pytest.mark.skipif(
    not RECORDS.exists(), reason="the logs of the challenge's records are not in the repository"
)


def read(tmp_path, text, name="train.log"):
    """The Logs of a text."""
    path = tmp_path / name
    path.write_text(text)
    return read_logs(path)


def one(tmp_path, text, name="train.log"):
    """The Log of a text of one run."""
    (log,) = read(tmp_path, text, name)
    return log


# ---- formats, each in a few lines of our own

CLARK = """W0101 00:00:00.000000 7 torch/distributed/run.py:1] ****
Hyperparameters:
  adam_wd: 0.5
  datasets_dir: ./data/datasets/fineweb10B_sp8192
  iterations: 900
  seed: 77
  tokenizer_path: ./data/tokenizers/fineweb_8192_bpe.model
  train_batch_tokens: 4096
  world_size: 8
train_shards: 3
model_params:123456
warmup_step: 1/20
0/900 val_loss: 9.0000 val_bpb: 3.5000
1/900 train_loss: 9.0000 train_time: 0.1m tok/s: 100
500/900 train_loss: 3.0000 train_time: 1.5m tok/s: 100
800/900 val_loss: 2.5000 val_bpb: 1.2500
stopping_early: wallclock_cap train_time: 120000ms step: 800/900
pre-quantization post-ema val_loss:2.49000000 val_bpb:1.24000000 eval_time:1000ms
Code size: 2000 bytes
Serialized model quantized+brotli: 8000 bytes
Total submission size quantized+brotli: 10000 bytes
quantized val_loss:2.60000000 val_bpb:1.30000000 eval_time:2000ms
quantized_sliding_window val_loss:2.44000000 val_bpb:1.22000000 eval_time:3000ms
"""


def test_clarks_style(tmp_path):
    log = one(tmp_path, CLARK)
    assert (log.seed, log.steps, log.iterations, log.train_seconds, log.step_avg) == (
        77,
        800,
        900,
        120,
        150,
    )
    assert (log.world_size, log.batch_tokens, log.parameters) == (8, 4096, 123456)
    assert (log.code_bytes, log.total_bytes, log.tokenizer) == (2000, 10000, "sp8192")
    assert log.averaged.val_bpb == 1.24 and log.prequant.val_bpb == 1.25 and log.capped
    assert {s: r.val_bpb for s, r in log.results.items()} == dict(
        roundtrip=1.3, sliding_window=1.22
    )
    assert log.train.tolist() == [[1, 9, 6000], [500, 3, 90000]] and log.eval_seconds == 5
    assert log.settings["adam_wd"] == "0.5" and log.score.stage == "sliding_window"
    assert log.score.causal and log.score.how == "by its stage's name"


@pytest.mark.parametrize(
    "lines,stage,bpb,seconds,causal",
    [
        ("ttt:start chunks=9 ttt_lr=0.1\nquantized_ttt val_loss:2.40000000 val_bpb:1.20000000 eval_time:9000ms", "ttt", 1.2, 9, True),
        ("ttt_progress: batch 7/9 batch_loss:2 batch_bpb:1.1 running_loss:2 running_bpb:1.1\nquantized_ttt_lora val_loss:2.4 val_bpb:1.19 eval_time:8000ms\ntotal_eval_time:8.0s", "ttt_lora", 1.19, 8, True),
        ("ttt_phased: total_docs:5 prefix_docs:2\nttp: b7/9 bl:2.2 bb:1.0 rl:2.2 rb:1.0 dl:1-2 gd:0\nttpp: phase:1/3 pd:1 gd:6 t:1.8s\ntttg: c1/2 lr:0.1 t:0.4s\nquantized_ttt_phased val_loss:2.3 val_bpb:1.18 eval_time:7000ms", "ttt_phased", 1.18, 7, True),
        ("final_int8_ttt_lora val_loss:2.3 val_bpb:1.17 eval_time:6000ms", "ttt_lora", 1.17, 6, True),
        ("sgd_ttt param_set:all lr:0.1 cache:True val_loss:2.3 val_bpb:1.16 time:5000ms\nsgd_ttt_exact val_loss:2.30000000 val_bpb:1.16000000", "ttt", 1.16, 5, None),
        ("final_int6_sliding_window_ngram9 val_loss:0.9 val_bpb:0.5 eval_time:4000ms", "ngram", 0.5, 4, False),
        ("ttt:score-first-sgd val_loss:2.4 val_bpb:1.2 eval_time:2000ms", "ttt", 1.2, 2, True),
        ("turbo_ttt val_loss:2.4 val_bpb:1.2 eval_time:2000ms", "ttt", 1.2, 2, None),
        ("quantized_slot val_loss:1.9 val_bpb:0.9 eval_time:3000ms", "slot", 0.9, 3, False),
        ("quantized_sliding_etlb val_loss:2.2 val_bpb:1.15 eval_time:3000ms", "etlb", 1.15, 3, None),
    ],
)  # fmt: skip
def test_stages_keep_their_names_and_say_what_is_known_of_them(
    lines, stage, bpb, seconds, causal, tmp_path
):
    log = one(tmp_path, CLARK + lines + "\n")
    result = log.results[stage]
    assert (result.val_bpb, result.seconds, result.causal) == (bpb, seconds, causal)
    assert log.score is result and result.how and log.finished
    assert NAMES[stage] in cells(log) and (causal is not False or "C2" in result.breaks)


def test_a_time_before_each_line_is_no_part_of_it(tmp_path):
    stamped = "".join(f"1700000000.{i:03d} {line}\n" for i, line in enumerate(CLARK.splitlines()))
    dated = "".join(
        f"2026-01-02 03:04:05,678 - INFO - {line}\n" for line in CLARK.splitlines()[10:]
    )
    log = one(tmp_path, stamped)
    assert (log.seed, log.steps, log.score.val_bpb) == (77, 800, 1.22)
    assert one(tmp_path, dated).score.val_bpb == 1.22


@pytest.mark.parametrize("coding", ["utf-16", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_logs_of_windows(coding, end, tmp_path):
    bar = "".join(f"\r {i} %|###" for i in range(9000))
    (tmp_path / "a.log").write_bytes(f"x\n{bar}\r{CLARK}".replace("\n", end).encode(coding))
    (log,) = read_logs(tmp_path / "a.log")
    assert (log.seed, log.steps, log.score.val_bpb, log.broken) == (77, 800, 1.22, 0)


TERNARY = """import torch
    step:1/2 train_loss:9 train_time:1ms step_avg:1ms
====================================================================================================
PyTorch 2.10.0+cu128
--- Hyperparameters ---
ema=False iterations=500 run_id=x seed=5 tokenizer_path=./data/tokenizers/fineweb_1024_bpe.model train_batch_tokens=64
params:7654321 L:2 d:4 h:8 kv:4 ws:8 ga:1 s:5
warmup:1/5
step:100/500 loss:3.5 t:1000ms avg:10.0ms
step:300/500 val_loss:3.1000 val_bpb:1.4000 train_time:3000ms zero_frac:0.3
stopping_early: wallclock_cap train_time:3000ms
compression: lzma=15.90MB brotli=15.82MB
artifact:15.92MB ternary:64(14B) fp:25(25B) code:700
budget:15000001/16000000 (15.00/16.00MB) FITS
final_ternary_roundtrip val_loss:3.2000 val_bpb:1.5000
temp_scaling optimal_T:0.90 time:20ms
final_sliding val_loss:3.0000 val_bpb:1.3000 (stride=16, T=0.90) time:4000ms
"""


def test_ternary_and_binary_logs(tmp_path):
    log = one(tmp_path, TERNARY)
    assert (log.seed, log.steps, log.parameters, log.world_size, log.torch) == (
        5,
        300,
        7654321,
        8,
        "2.10.0+cu128",
    )
    assert (log.total_bytes, log.code_bytes, log.tokenizer) == (15_000_001, 700, "sp1024")
    sliding = log.results["sliding_window"]
    assert (sliding.val_bpb, sliding.seconds, sliding.stride) == (1.3, 4, 16)
    assert sliding.causal is None and "temperature" in sliding.how  # fitted on what?
    assert log.results["roundtrip"].causal is True
    cool = one(tmp_path, TERNARY.replace("optimal_T:0.90", "optimal_T:1.00"))
    assert cool.results["sliding_window"].causal is True
    size = "INT4+fp8+brotli: 15.42MB model + 0.077MB code = 15.50/16.00MB FITS"
    rounded = one(tmp_path, TERNARY.replace("budget:15000001/16000000 (15.00/16.00MB) FITS", size))
    assert rounded.total_bytes is None and cells(rounded)["artifact + code"][1] == "15.50 MB"


@pytest.mark.parametrize(
    "before,label,stage",
    [
        ("Compilation done, starting sliding window eval...", "final_int8_zlib_roundtrip", "sliding_window"),
        ("final_eval_mode:sliding_window stride:64", "final_int8_zlib_roundtrip", "sliding_window"),
        ("  sliding_eval [ 99.9%] 9/10 windows running_bpb=1.2", "final_int6_roundtrip", "sliding_window"),
        ("x", "final_int8_zlib_roundtrip sliding", "sliding_window"),
        ("x", "final_int8_zlib_roundtrip eval_mode:online_ttt", "ttt"),
        ("x", "final_int6_lzma_roundtrip(ttt_lora)", "ttt_lora"),
        ("x", "final_w6e16_zstd22_roundtrip", "roundtrip"),
        ("x", "final_sliding_window_eval stride:64", "sliding_window"),
        ("x", "DIAGNOSTIC post_swa", "averaged"),
        ("x", "diagnostic quantized", "roundtrip"),
    ],
)  # fmt: skip
def test_a_label_that_says_less_than_the_lines_before_it(before, label, stage, tmp_path):
    word = label.split()[0].split("(")[0]
    exact = label.replace(word, word + "_exact") if word.startswith("final") else label
    exact = exact.split("(")[0].replace(" eval_mode:online_ttt", "")
    text = f"step:9/9 val_loss:2.4 val_bpb:1.4 train_time:90ms\n{before}\n{label} val_loss:2.3457 val_bpb:1.2346 eval_time:5000ms\n{exact} val_loss:2.34567890 val_bpb:1.23456789\n"
    log = one(tmp_path, text)
    result = log.averaged if stage == "averaged" else log.results.pop(stage)
    assert result.val_bpb == 1.23456789 and log.results == {} and result.seconds == 5


@pytest.mark.parametrize(
    "line,breaks,words",
    [
        ("ngram_cache: hits=9/10 alpha=0.2 buckets=4", "C2", "n-gram cache"),
        ("ngram_tilt:precompute n_tok=9 base_beta=2.0 within_beta=0.5", "C2", "target's class"),
        ("prequant_ttt:epoch 1/2 loss:1.9 time:19.4s", "C3", "validation tokens"),
        ("train_loader:dataset:fineweb10B_sp1024_valonly train_shards:1", "C3", "validation text"),
    ],
)
def test_what_lines_before_a_score_say_of_it(line, breaks, words, tmp_path):
    plain = "step:9/9 val_loss:2.4 val_bpb:1.4 train_time:90ms\n"
    score = "final_int6_sliding_window val_loss:1.4 val_bpb:0.8 stride:64 eval_time:5000ms\n"
    result = one(tmp_path, plain + line + "\n" + score).score
    assert (result.causal, result.breaks) == (False, breaks) and words in result.how
    assert one(tmp_path, plain + score + "x\n").score.causal is True


def test_hints_without_gates_on_the_target_and_what_is_only_not_known(tmp_path):
    score = "final_int6_sliding_window val_loss:1.4 val_bpb:0.8 stride:64 eval_time:5000ms\n"
    text = "ngram_tilt:precompute n_tok=9 base_beta=2.0 within_beta=0.0 agree_bonus=0.1\n"
    assert one(tmp_path, text + score).score.causal is True
    for line in (
        "Paid prefix blob: 47 bytes",
        "  Logistic context mixer enabled: eta=0.1",
        "ttt:start lr=0.002 momentum=0.9 epochs=3\nttt_epoch:1/3 loss:1.9 time:14.5s\nttt:done elapsed=43.1s",
        "ttt:rank0 short=2 long=3 epochs=3 batch=64",
    ):
        result = one(tmp_path, line + "\n" + score).score
        assert result.causal is None and result.how


def test_one_score_under_three_labels_counts_once(tmp_path):
    text = """step:9/9 val_loss:2.4 val_bpb:1.4 train_time:90ms
ppm_full_native tokens=9 bytes=20 mix_bpb=1.03000001 ppm_only=2.3 nn_byte_bpb=1.1
legal_ttt_exact val_loss:0.71000000 val_bpb:1.03000001 eval_time:0ms
final_int6_sliding_window_exact val_loss:0.71000000 val_bpb:1.03000001 eval_time:0ms
"""
    log = one(tmp_path, text)
    assert list(log.results) == ["ppm"] and log.score.causal is False and log.score.breaks == "C2"
    assert math.isnan(log.score.val_loss) and len(log.mislabelled) == 2
    assert "legal_ttt_exact 1.03000001 is the score of ppm, not of a ttt" in log.mislabelled[0]


def test_ttt_under_the_label_of_a_roundtrip(tmp_path):
    text = """step:9/9 val_loss:2.4 val_bpb:1.4 train_time:90ms
final_int8_zlib_roundtrip val_loss:2.2 val_bpb:1.3 eval_time:1000ms
final_int8_zlib_roundtrip_base val_loss:2.20000001 val_bpb:1.30000001
final_int8_zlib_roundtrip_ttt val_loss:2.1000 val_bpb:1.2000 eval_time:5000ms
final_int8_zlib_roundtrip_exact val_loss:2.10000001 val_bpb:1.20000001
"""
    log = one(tmp_path, text)
    assert log.results["roundtrip"].val_bpb == 1.30000001
    assert (log.results["ttt"].val_bpb, log.results["ttt"].seconds) == (1.20000001, 5)
    text = """step:9/9 val_loss:2.4 val_bpb:1.4 train_time:90ms
ttt_sliding:start chunks=9 stride=64
ttt_sliding:done val_loss=2.100001 val_bpb=1.200001 elapsed=5.0s
final_int6_roundtrip val_loss:2.1000 val_bpb:1.2000 eval_time:5000ms
final_int6_roundtrip_exact val_loss:2.10000100 val_bpb:1.20000100
"""
    log = one(tmp_path, text)
    assert list(log.results) == ["ttt"] and log.score.val_bpb == 1.200001 and log.finished
    assert len(log.mislabelled) == 1


def test_several_runs_in_a_file_are_a_row_each(tmp_path, capsys):
    runs = [
        f"{'=' * 100}\nRunning Python 3.12\nRunning PyTorch 2.9\nmodel_params:5\nseed:7\n"
        f"step:200/900 train_loss:2.0 train_time:20ms step_avg:1ms\n"
        f"step:{n}/900 val_loss:2.1 val_bpb:1.1 train_time:{n * 10}ms\n"
        f"Total submission size int8+zlib: {n * 100} bytes\n"
        f"final_int8_zlib_roundtrip_exact val_loss:2.00000000 val_bpb:1.{n}0000\n"
        for n in (300, 400, 500)
    ]
    logs = read(tmp_path, "".join(runs))
    assert [(log.run, log.steps, log.total_bytes, log.score.val_bpb) for log in logs] == [
        (1, 300, 30000, 1.3),
        (2, 400, 40000, 1.4),
        (3, 500, 50000, 1.5),
    ]
    with pytest.raises(LogError, match="has 3 runs"):
        read_log(tmp_path / "train.log")
    assert report.main([str(tmp_path / "train.log")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 7")]
    assert len(rows) == 3 and all(f"1.{n}" in row for n, row in zip("345", rows))
    assert len(read(tmp_path, runs[0] + runs[0])) == 1  # console and log put together
    plain = "".join(f"step:{i}/3 train_loss:2.0 train_time:{i}ms\n" for i in (1, 2, 3))
    assert len(read(tmp_path, plain + plain.replace("2.0", "1.0"))) == 2  # without any header


def test_source_above_a_log_says_nothing_however_it_ends(tmp_path):
    source = '#!/usr/bin/env python3\n"""A script.\n\nseed:1\nstep:5/9 val_loss:1.0 val_bpb:0.1 train_time:5ms\nfinal_int6_roundtrip val_loss:1.0 val_bpb:0.1\n"""\nimport os\nx = 1\n'
    for end in ("=" * 100, "logs/a.txt", "Running Python 3.12.1", "train_loader:dataset:x"):
        log = one(tmp_path, f"{source}{end}\nseed:3\nstep:9/9 val_loss:2.0 val_bpb:1.2\n")
        assert (log.seed, log.steps, log.prequant.val_bpb, log.results) == (3, 9, 1.2, {})
    with pytest.raises(NoLog, match="is source"):
        read(tmp_path, source)


def test_validations_of_other_metrics(tmp_path):
    text = """step=1 mean_microbatch_loss=8.2 validation_loss=8.6 validation_bpb=9.9 muon_momentum=0.85
step=2 mean_microbatch_loss=8.1 validation_loss=8.5 validation_bpb=9.8 muon_momentum=0.85
trained_validation_exact val_loss:8.50000000 val_bpb:9.80000000
"""
    log = one(tmp_path, text)
    assert log.validation[-1][:3] == (2, 8.5, 9.8) and log.averaged.val_bpb == 9.8
    text = "step:500/999 val_bpb:1.7 *BEST* tokens:3M elapsed:78s\nFINAL val_bpb: 1.6\n"
    log = one(tmp_path, text)
    assert (log.steps, log.train_seconds, log.score.val_bpb) == (500, 78, 1.6)
    assert log.score.causal is None and math.isnan(log.score.val_loss)
    text = "step:6/9 val_loss:2.4 val_bpb:3.5 est_bpb:1.4 train_time:5ms\nfinal val_loss:2.4 val_bpb:1.45\n"
    log = one(tmp_path, text)
    assert (log.prequant.val_bpb, log.score.label, log.score.val_bpb) == (3.5, "final", 1.45)
    log = one(tmp_path, "iter 5: train loss 2.5, val loss 2.6\n")
    assert log.validation[0][:2] == (5, 2.6) and log.prequant is None and log.steps == 5
    text = "step:1/9 fitness:-3.0 t:5ms\nstep:2/9 val_loss:2.4 val_bpb:1.5 train_time:5ms\n"
    assert one(tmp_path, text).steps == 2


def test_a_score_without_its_loss_or_on_lines_of_its_own(tmp_path):
    text = (
        "  val_loss: 5.4\n  val_bpb:  3.2\n\n  Total artifact: 8,853,380 bytes\n\n  val_bpb: 3.2\n"
    )
    log = one(tmp_path, "=== Validation ===\n" + text)
    assert (log.score.val_loss, log.score.val_bpb, log.total_bytes) == (5.4, 3.2, 8853380)
    text = """raw_model:99 code:7 total:106
int8_zlib:30 code:7 total:37 payload_ratio:3.5x
final_roundtrip val_loss:2.4 val_bpb:1.5 eval:3000ms
final_roundtrip_exact val_bpb:1.50000001
"""
    log = one(tmp_path, text)
    assert (log.total_bytes, log.code_bytes, log.score.val_bpb) == (37, 7, 1.50000001)
    assert (log.score.val_loss, log.score.seconds, log.trained) == (2.4, 3, False)


@pytest.mark.parametrize(
    "line",
    ['config: {"seed": 9, "lr": 0.5}', "{'seed': 9, 'lr': 0.5}", "seed=9 lr=0.5", "seed:9 lr:0.5"],
)
def test_settings_of_other_forms(line, tmp_path):
    log = one(tmp_path, line + "\nstep:6/9 val_loss:2.4 val_bpb:1.5 train_time:5ms\n")
    assert (log.seed, log.settings["lr"]) == (9, "0.5")


def test_a_line_about_a_score_that_is_not_one_is_none(tmp_path):
    text = """step:6/9 val_loss:2.4 val_bpb:1.5 train_time:5ms
ttt:progress chunk:3/9 val_loss:2.0 val_bpb:1.0 elapsed:3.0s
ttt_sliding:done val_loss=1.9 val_bpb=1.1 elapsed=3.0s
eval: batch 20/100 running_loss:2.0
best so far | val_loss: 1.0 val_bpb: 0.9
final_int8_ttt_lora skipped:model_kind=x
seed:7 val_loss:1.0 val_bpb:0.9
"""
    log = one(tmp_path, text)
    assert log.results == {} and log.score is None and log.broken == 0


def test_a_gpu_without_a_name_and_lines_that_were_cut_off(tmp_path):
    text = """|   0  NVIDIA GH200 480GB             On  |   0000:01:00.0 Off |
NVIDIA
| NVIDIA-SMI 580 |
nvidia: NVIDIA?
step:6/9 val_loss:2.4 val_bpb:1.5 train_time:5ms
step:7/9 train_loss:2.\x00
step:8/9 train_loss:
final_int6_roundtrip val_loss:2.4 val_
Total submission size int6: bytes
Code size: many bytes
"""
    log = one(tmp_path, text.replace("\x00", "x"))
    assert log.hardware == "NVIDIA GH200 480GB" and (log.steps, log.broken) == (6, 3)
    assert log.total_bytes is None and log.results == {}


@pytest.mark.parametrize(
    "text,what",
    [
        ("torch==2.9\nnumpy>=2\n# a comment\n--extra-index-url https://x\n", "a list of packages"),
        ("numpy\ntqdm\ntorch\n", "a list of packages"),
        ('{"val_bpb": 1.2,\n "seeds": [1]}\n', "JSON"),
        ('=== seed=1 result ===\n{\n "post_ttt_val_bpb": 1.06\n}\n', "a summary of runs"),
        ("# Training Summary\nval_bpb (pre-quant): 2.26\n", "a summary of runs"),
        (
            "start\nTraceback (most recent call last):\n  File x\nKeyError: 1\n",
            "ended with an error",
        ),
        ("ablate_slot evaluator:slot val_loss:1.0 val_bpb:1.0\n", "tools.ablate"),
        ("", "is empty"),
    ],
)
def test_what_is_no_log_is_said(text, what, tmp_path):
    with pytest.raises(NoLog, match=what):
        read(tmp_path, text)


def test_a_folders_other_texts_are_no_faults_of_it(tmp_path, capsys):
    (tmp_path / "README.md").write_text("a\n")
    (tmp_path / "train.log").write_text(CLARK)
    (tmp_path / "notes.txt").write_text("torch==2.9\n")
    assert report.main([str(tmp_path)]) == 0
    assert "note: " in capsys.readouterr().err
    assert report.main([str(tmp_path / "notes.txt")]) == 2


def test_a_last_line_without_an_end_counts_if_it_is_whole(tmp_path):
    first = "step:6/9 val_loss:2.4 val_bpb:1.5 train_time:5ms\n"
    for last, whole in (
        ("final_int6_roundtrip val_loss:2.4000 val_bpb:1.2345", True),
        ("final_int6_roundtrip val_loss:2.4000 val_bpb:1.23", False),
        ("final_int6_roundtrip val_loss:2.4000 val_bpb:1.2345 eval_time:5", False),
        ("final_int6_roundtrip val_loss:2.4000 val_bpb:1.2345 eval_time:5ms", True),
    ):
        log = one(tmp_path, first + last)
        assert bool(log.results) == whole and log.broken == (not whole), last


def test_no_damage_to_a_log_is_a_traceback(tmp_path, capsys):
    rng = random.Random(0)
    odd = b"0123456789.:-/ \n\rnaife\xff[]{}"
    for _ in range(150):
        text = bytearray(rng.choice((CLARK, TERNARY)).encode())
        for _ in range(rng.choice((1, 9, 60))):
            at = rng.randrange(len(text))
            new = rng.choice(
                (b"", bytes([rng.choice(odd)]), b"nan", b"1e999", b"9" * 30, text[:40])
            )
            text[at : at + rng.choice((0, 1, 1, 30))] = new
        (tmp_path / "a.log").write_bytes(text)
        assert report.main([str(tmp_path / "a.log")]) in (0, 2)
        assert report.main(["--board", str(tmp_path), "--html", str(tmp_path / "b")]) in (0, 2)


def test_the_tables_rows_can_be_told_apart():
    """Every stage of a table has a row; a row that can never match, behind one that takes all of its lines, would be dead."""
    assert set(STAGES) | {"averaged"} == {stage.key for stage in STAGE_TABLE}
    assert len({pattern.pattern for pattern, _ in LINES}) == len(LINES)
    reading = Reading(Log(None))
    for line in ("", "x" * 20_000, "step" * 5000, "9/" * 9000, "a:b " * 5000, "[" * 20_000):
        began = time.process_time()
        take(reading, line)
        assert time.process_time() - began < 2  # no pattern goes wild on a long line


# ---- all logs of the challenge's records


def logs_of(folder):
    """Logs of a folder by file name."""
    return {
        p.name: read_logs(p)
        for p in sorted(folder.iterdir())
        if p.suffix in (".log", ".txt") and "summary" not in p.name
    }


@needs_records
def test_every_log_of_the_records_is_read_and_nothing_is_a_traceback(capsys):
    files = [p for p in sorted(RECORDS.rglob("*")) if p.suffix in (".log", ".txt")]
    assert len(files) == 165
    assert report.main([str(p) for p in files]) == 2  # one is a summary
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert "summary.log: is a summary of runs, no training log" in line
    rows = [row for row in captured.out.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + 168 + 2  # a heading, a row a run, mean and deviation
    logs = [log for p in files if "summary" not in p.name for log in read_logs(p)]
    unscored = {log.path.name for log in logs if not log.score}
    assert (
        unscored
        == {  # that have no score of an artifact
            "train.log",  # of DG attention: too large, not scored
            "log_eggroll_3-last-layers.txt",
            "log_eggroll_all-layers-perturbed.txt",
        }
        and sum(not log.score for log in logs) == 3
    )
    assert {log.path.name for log in logs if not log.trained} == {
        f"ttt_pr1767__seed_{seed}.log" for seed in (0, 42, 1234)
    }
    assert all(log.steps for log in logs if log.trained)
    assert sum(log.total_bytes is None and log.rounded_bytes is None for log in logs) == 5
    assert sum(log.broken for log in logs) == 0


# What the folders' own submission.json say, written down by hand: the score, and the logs whose mean it is ("" for all of the folder).
CLAIMS = {
    "2026-03-17_LoRA_TTT": ("1.1929", "train_v3.txt"),
    "2026-03-17_NaiveBaseline": ("1.22436570", ""),
    "2026-03-18_FP16Embed_WD3600": ("1.21972502", "train.log"),
    "2026-03-18_LongContextSeq2048": ("1.20576485", "train.log"),
    "2026-03-18_LowerLR": ("1.22296644", ""),
    "2026-03-19_10L_MixedPrecision": ("1.21474500", ""),
    "2026-03-19_Seq2048_FP16Emb_TunedLR": ("1.15861696", "train_seed3.log"),
    "2026-03-19_SlidingWindowEval": ("1.19250007", ""),
    "2026-03-19_SlidingWindow_FP16Emb_10L_MuonWD_OvertoneInit": ("1.17475315", ""),
    "2026-03-19_TrainingOptSeq4096": ("1.20143417", "train.log"),
    "2026-03-19_WarmdownQuantization": ("1.15744040", ""),
    "2026-03-19_smeargate_orthoinit_muonwd": ("1.1556", ""),
    "2026-03-20_11L_EfficientPartialXSA_FA3_SWA120": ("1.13071416", ""),
    "2026-03-20_11L_XSA4_EMA_Int6_MLP3x_WD04_1.1271": ("1.12707468", "train.log"),
    "2026-03-20_Int6_MLP3x_SmearGate_BigramHash_MuonWD_SWA": ("1.14581692", ""),
    "2026-03-21_11L_XSA4_EMA_PartialRoPE_LateQAT_1.1248": ("1.12484502", "train.log"),
    "2026-03-22_11L_EMA_GPTQ-lite_warmdown3500_QAT015_1.1233": ("1.12278022", "train.log"),
    "2026-03-23_LeakyReLU_LegalTTT_ParallelMuon": ("1.1194", ""),
    "2026-03-25_ValCalib_GPTQ_XSA_BigramHash3072": ("1.11473509", ""),
    "2026-03-29_Loader_FullGPTQ_XSA11_BigramHash2816": ("1.1122", ""),
    "2026-03-31_ParallelResiduals_MiniDepthRecurrence": ("1.10625353", ""),
    "2026-04-01_Vocab4096_MLPMult4_WD085": ("1.09785", ""),
    "2026-04-03_MuonEqR_DepthRecurrence_WD090_AllInt6": ("1.0912", ""),
    "2026-04-05_SP8192_GPTQ-Embeddings_SDClip_Loop45x2": ("1.08563", ""),
    "2026-04-06_SP8192_QK5_LegalTTT_1.0828": ("1.08279384", ""),
    "2026-04-08_SP8192_ParallelResid_ScoreFirstTTT": ("1.08217956", ""),
    "2026-04-09_A2_Muon097_3Seed": ("1.07983273", ""),
    "2026-04-09_SP8192_3LayerRecur_ParResid_QK525_LegalTTT": ("1.0810", ""),
    "2026-04-10_VarLenAttn": ("1.07336388", ""),
    "2026-04-13_VarLenAttn_PhasingTTT2000": ("1.07280628", ""),
    "2026-04-14_MultiPhaseGlobalSGD_PhasedTTT": ("1.07193", ""),
    "2026-04-16_SmearGate_AttentionOutputGate_ScoreFirstTTT": ("1.07139", ""),
    "2026-04-18_PR1626_CaseOps_Taper": ("1.06780094", ""),
    "2026-04-19_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT": ("1.06549", ""),
    "2026-04-22_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT_MLPClip12": ("1.06453", ""),
    "2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611": ("1.06107587", ""),
    "2026-04-27_SmearGateBOSFix_PR1787Base_LQERAsym_PhasedTTT": ("1.06128", ""),
    "2026-03-18_Quasi10Bfrom50B_SP1024_9x512_KV4_4h_pgut3": ("1.20737944", ""),
    "2026-03-29_HNet_ByteVsSubword_Study": ("1.35945128", "train_byte260_4h.log"),
    "2026-03-30_ByteJEPA": ("1.34960213", ""),
    "2026-04-15_Mamba3Hybrid_SP8192_GPTQ_TTT": ("1.14730259", ""),
}
# Of each seed its score, steps and bytes, from seed_results of the same files, where they say them and the log is of that run.
SEEDS = {
    "2026-03-25_ValCalib_GPTQ_XSA_BigramHash3072": {
        314: ("1.11508120", 6927, 15863278),
        42: ("1.11437394", 6922, 15984850),
        999: ("1.11475014", 6917, 15876310),
    },
    "2026-03-31_ParallelResiduals_MiniDepthRecurrence": {
        1337: ("1.10658225", 6242, 15942395),
        42: ("1.10774252", 6248, 15919617),
        2024: ("1.10443581", 6240, 15946657),
    },
    "2026-04-01_Vocab4096_MLPMult4_WD085": {
        42: ("1.09744", 5967, 15915268),
        1337: ("1.09795", 5962, 15905460),
        2025: ("1.09816", 5961, 15927782),
    },
    "2026-04-05_SP8192_GPTQ-Embeddings_SDClip_Loop45x2": {
        1: ("1.08554", 4988, 15987547),
        42: ("1.08664", 4986, 15988983),
        1234: ("1.08463", 4989, 15983318),
        1337: ("1.08554", 4992, 15984924),
        2025: ("1.08578", 4989, 15983617),
    },
    "2026-04-10_VarLenAttn": {
        0: ("1.07258208", None, 15996664),
        1: ("1.07324696", None, 15993874),
        2: ("1.07426259", None, 15984798),
    },
    "2026-04-13_VarLenAttn_PhasingTTT2000": {
        0: ("1.07216564", None, 15996697),
        1: ("1.07300174", None, 15995985),
        2: ("1.07325147", None, 15988805),
    },
    "2026-04-19_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT": {
        42: ("1.06610", 4854, 15978834),
        0: ("1.06473", 4843, 15971476),
        1234: ("1.06563", 4847, 15975050),
    },
    "2026-04-22_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT_MLPClip12": {
        314: ("1.06356801", 4872, 15979114),
        2025: ("1.06413130", 4869, 15977203),
        777: ("1.06466993", 4866, 15971178),
        1: ("1.06509678", 4869, 15979182),
        1337: ("1.06516558", 4864, 15971129),
    },
    "2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611": {
        42: ("1.05989454", 4945, 15897259),
        0: ("1.06124613", 4932, 15900947),
        1234: ("1.06208695", 4917, 15907550),
    },
}


def folder_of(name):
    """A folder of the records by its name."""
    (folder,) = RECORDS.glob(f"*/{name}")
    return folder


def near(told, value):
    """Whether a figure is what was told, at the digits told; one more unit for what its authors rounded twice."""
    return abs(float(told) - value) <= 1.1 * 10.0 ** -len(told.partition(".")[2])


@needs_records
@pytest.mark.parametrize("name", CLAIMS)
def test_scores_are_those_of_the_folders_own_submission(name):
    told, file = CLAIMS[name]
    logs = [log for found in logs_of(folder_of(name)).values() for log in found]
    scores = {log.path.name: log.score.val_bpb for log in logs}
    mean = scores[file] if file else statistics.mean(scores.values())
    assert near(told, mean), (told, scores)


@needs_records
@pytest.mark.parametrize("name", SEEDS)
def test_steps_and_bytes_are_those_of_the_folders_own_submission(name):
    logs = {log.seed: log for found in logs_of(folder_of(name)).values() for log in found}
    for seed, (told, steps, size) in SEEDS[name].items():
        log = logs[seed]
        assert near(told, log.score.val_bpb) and log.total_bytes == size
        assert steps in (None, log.steps)
