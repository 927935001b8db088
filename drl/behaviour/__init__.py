"""Behaviour policies: the SAC actors that collect the data, shipped as package data.

    <env>.safetensors, <env>.json   snapshots and their card, made by scripts/train_behaviour.py
    actor.py                        a snapshot as a policy
    play.py                         a shard of episodes by one snapshot: what each core does in `drl data collect`
    rounding.py                     the products that the same seed needs on every machine
    plan.py                         which shards make a dataset
    pieces.py                       played shards on disk
"""
