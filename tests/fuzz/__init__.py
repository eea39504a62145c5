"""A fuzzer of hand-written decoders: programs made of a grammar, run under the backend beside eager code.

    make fuzz MINUTES=60        # goes on where it stopped

| file | what |
|---|---|
| case.py | what is drawn: one choice of each part, and what happens to the cache |
| holders.py | what a program keeps its keys and values in |
| appends.py | positions, and how new tokens are written |
| attention.py | how the cache is read, masked and attended to |
| program.py | a case as the text of a Python program |
| comparison.py | run it: compiled beside eager, each step and the whole |
| campaign.py | many cases: counts, failures as scripts, what is resumed |
"""
