"""Each script measures one thing, beside a plain baseline in the same run, prints a table and writes JSON."""
