"""What NITP costs, measured: whole training steps, the loss alone, and the roofline beside them.

    throughput   complete training steps of several variants, in turn   loss        the loss alone, several ways
    variants     what the variants are                                  heads       those ways
    jobs         a variant and a job file -> a trainer's configuration  loss_memory its memory, without a device
    contestant   a trainer that runs some steps when it is its turn     live_bytes  storages, counted as they live
    race         all of them in one process                             roofline    NITP's work at best
    stock, mtp   the trainers that are not ours                         bars, page  figures to reach; the page
    batches      the same packed batches for every variant              results     where they lie, what they say
    measure      turns, medians, overheads                              summary     times -> what is written, shown
    memory       peaks of memory                                        depth       slices of a model -> all of it
    console      what each of the programs begins and ends with         needs       what a machine lacks

README.md says how to run them and how to read what they write.
"""
