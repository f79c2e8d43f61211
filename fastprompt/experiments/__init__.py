"""Studies of prompt tuning: the runs they leave behind and the report that is made of them."""
