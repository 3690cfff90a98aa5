"""From shards on a disk or in a store to the batches of a rank. The modules, in the order in which a document meets them:

where it lies     spec, storage, cache, retry, names, tars, shards
what it is        faults, documents, media/, index, corpus
what it costs     tokens, budget, spans, form, pieces
what it becomes   chance, masking, sentences, segments, source
when it is due    mixture, packing, plan
how it is read    decode, positions, collate, reader, workers, loader; raw: bytes alone
what went wrong   quarantine, validate, ledger
how it looks      stats, preview, articles, inline
"""
