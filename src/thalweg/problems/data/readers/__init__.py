"""One file a format: IDX, npz, CIFAR binary, tab-separated phrases.

Every reader checks what the file claims before it allocates memory, runs no code from a file, and
answers a missing, damaged or hostile one with `InvalidInput`.
"""
