"""One module per command of the command line: its options and its work.

A command imports what it needs when it runs, so that `tritonkern --help` loads neither PyTorch nor a video library.
"""
