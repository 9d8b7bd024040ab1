"""The convolutions of a temporal adapter around a backbone's tokens; see README.md in this folder."""
