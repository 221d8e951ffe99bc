"""Nothing here is collected: the mutants are run by hand."""

collect_ignore_glob = ["*"]
