"""That every layout computes what one rank computes: `mmpt verify CONFIG`.

config --shrink, families--> small configs            --mixes--> packs of made-up documents of every kind
layouts that N ranks allow --crew of processes--> one optimizer step each --compare with one rank's--> table
"""
