"""What NITP costs, measured: whole training steps, the loss alone, and the roofline beside them.

    throughput   complete training steps of several variants, in turn    loss       the loss alone, several ways
    variants     what the variants are                                   heads      those ways
    jobs         a variant and a job file -> a trainer's configuration   roofline   what NITP's work costs at best
    contestant   a trainer that runs some steps when it is its turn      bars, page the figures to reach; the page
    race         all of them in one process                              results    where results lie, what they say
    stock, mtp   the trainers that are not ours                          summary    times -> what is written and shown
    batches      the same packed batches for every variant               depth      from slices of a model to all of it
    measure      turns, medians, overheads                               memory     peaks; console: what both begin with

README.md says how to run them and how to read what they write.
"""
