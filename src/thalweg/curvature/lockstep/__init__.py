"""Many runs of one model and loss in one batched computation: seeds, branches, learning rates.

Files are named like those of one run, whose ideas they batch.
"""
