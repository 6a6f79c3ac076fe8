"""`make demo`: a local cluster, hundreds of real jobs, hostile ones, a leader killed in the middle,
and an account in which every submission must appear exactly once."""
