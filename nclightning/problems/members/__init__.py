"""Members of the family: functions that make a problem of the literature from plain arguments."""
