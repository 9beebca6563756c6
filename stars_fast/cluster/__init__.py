"""More than one engine, on more than one machine, by Ray. Needs the extra ``ray``.

`stars_fast.cluster.bulk` runs a data set, `stars_fast.cluster.serve` a server of several replicas.
Importing this package imports neither Ray nor torch.
"""
