"""Tests mirror the package; what several of them need lies beside them."""
