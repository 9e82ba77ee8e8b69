"""Service modules that stand in for the real ones in tests of the launcher."""
