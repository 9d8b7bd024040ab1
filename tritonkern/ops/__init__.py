"""One folder per operation. `tritonkern.functional` is the public interface; README.md in each folder says what it
computes."""
