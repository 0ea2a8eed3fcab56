"""The plan for people and for programs: tables, charts, JSON."""
