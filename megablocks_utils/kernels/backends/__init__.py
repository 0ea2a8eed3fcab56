"""Each way to run the same experts: one file, one record; and the table of them."""
