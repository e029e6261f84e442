"""Tools around train_gpt.py, started in its folder as `python -m tools.NAME`; each has --help with examples.

    report      seed logs: tables, significance, checks, submission.json, figures, a board, a run that is running
    record      the folder that is handed in as a record, from the logs of its seeds
    ablate      one artifact under several evaluations, with intervals
    audit       is an evaluator what it says, ours or anybody's? conditions C1 to C4, checked from outside
    quantise    one checkpoint through several quantisers and byte budgets
    bench       how fast the script is, beside the plain PyTorch versions in plain

report's parts: logs reads them, by the table in lines; tables, significance, checks, submission, follow and figures say what is in
them; bytecount counts their text anew, scripts compares their sources; board ranks the runs under folders, and page writes that as
HTML. audit's are blackbox, evaluators and adapter with its adapter_host. documents compares training and
validation text. record's part is proof, which scores an artifact. console is how all of them speak and end.
"""
