"""A model reviews training data by a rubric: what it is asked, the marks in its replies, what becomes of a record."""
