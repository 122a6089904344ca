"""The engine: rows in, results out; the one loop that conducts studies, and the workers that train."""
