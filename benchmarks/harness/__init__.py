"""What every benchmark shares: cases, contenders, timing, memory, records and reports."""
