"""Each script measures one thing, ours beside a plain baseline in the same run; prints a table, writes JSON."""
