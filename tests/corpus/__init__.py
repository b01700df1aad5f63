"""Known truths to judge the judge by: planted bugs, benign rewrites, and a generator that draws new ones."""
