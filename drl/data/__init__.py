"""From recorded episodes to batches.

    minari_files.py   Minari datasets on disk: read, write, name        (the only door to minari)
    store.py          EpisodeStore: all episodes end to end, validated
    sampling.py       Batch, and the two ways to draw one: windows and streams
"""
