"""Partially relevant video retrieval: which of many untrimmed videos holds what a query asks for.

data         a grounding data set seen as a library of videos and queries
layout       reader of MS-SL's published features
evaluation   encode a library, score and re-rank, report
baselines    rules without training
experiments  train, choose on held-out recordings, test, record
recipes      the released hyper-parameters
"""
