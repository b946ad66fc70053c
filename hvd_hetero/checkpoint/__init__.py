"""Checkpoints of a job on disk: written whole or not at all, checked when read, and without pickle.

``RUN/checkpoints/000123/`` is the checkpoint of round 123. Each rank writes a shard: ``rank0003.safetensors``, its
tensors by dotted name, and ``rank0003.json``, everything else. Rank 0 writes ``manifest.json`` last, with the sizes and
the checksums of all shards; a folder without a valid one is no checkpoint. Every file is written under a temporary
name, synced, renamed, and its folder synced.

This room knows files only. Ranks agree among themselves outside of it, in two phases::

    info = store.write_shard(round, rank, state)                             # each rank
    infos = [ShardInfo.from_json(text) for text in gather(info.to_json())]   # whichever way the job has
    store.commit(round, infos, epochs=3, made_with={"train.lr": 0.1})        # rank 0, once it has them all
    store.discard(round)                                                     # rank 0, where a rank has none to give

and to go on from one::

    checkpoint = store.latest()                                              # rank 0 chooses and tells the round
    state = store.at(round).load(rank)                                       # each rank; if one cannot, an older one
    store.rewind(round)                                                      # rank 0, once all ranks have loaded
"""

from hvd_hetero.checkpoint.durable_files import Files
from hvd_hetero.checkpoint.encoding import join, split
from hvd_hetero.checkpoint.errors import CheckpointError
from hvd_hetero.checkpoint.manifest import Meta
from hvd_hetero.checkpoint.reader import Candidate, Checkpoint
from hvd_hetero.checkpoint.shard import ShardInfo
from hvd_hetero.checkpoint.store import Store

__all__ = ["Candidate", "Checkpoint", "CheckpointError", "Files", "Meta", "ShardInfo", "Store", "join", "split"]
