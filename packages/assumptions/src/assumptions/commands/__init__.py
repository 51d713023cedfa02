"""The steps of a study as commands over one folder, after `assumptions elicit`: probe, steer, report."""
