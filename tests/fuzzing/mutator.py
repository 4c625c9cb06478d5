"""A program: a guest that changes its rings, and much of it back, while the device reads them; until its parent ends.

`python mutator.py FD SEED START END RAM`: guest memory, the rings' place in it, the bytes of its RAM.
"""

import mmap
import os
import random
import sys

fd, seed, start, end, ram = map(int, sys.argv[1:])
memory = mmap.mmap(fd, 0)
decide = random.Random(seed)
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1000):
        place = decide.randrange(start, end) if decide.random() < 0.8 else decide.randrange(ram)
        old = memory[place]
        memory[place] = old ^ 1 << decide.randrange(8) if decide.random() < 0.7 else decide.randrange(256)
        if decide.random() < 0.7:
            memory[place] = old
