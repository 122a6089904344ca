"""What bnbench costs, as ratios in one table: `make bench`, or `python -m benchmarks [PART ...]`."""
