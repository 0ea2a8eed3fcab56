"""Files that start a planned run on a cluster: what `plan --launcher` prints."""
