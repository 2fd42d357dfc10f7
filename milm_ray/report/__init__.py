"""The report: every table and figure of a run on one page, the paper's numbers beside ours."""
