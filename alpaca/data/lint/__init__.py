"""Lint: rules that find faulty records in instruction data, listed by class in classes.py."""
