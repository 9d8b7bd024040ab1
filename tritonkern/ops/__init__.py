"""One folder per operation. `tritonkern.functional` is the public interface; each folder's README.md explains what the operation
computes."""
