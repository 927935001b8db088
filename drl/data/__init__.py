"""From recorded episodes to batches.

    minari_files.py      Minari datasets on disk: names, places, reading; downloads by minari_remote.py
    minari_metadata.py   what a dataset says of itself, read as data
    minari_hdf5.py       what a file of others must look like before it is read
    minari_writer.py     writing one, whole or not at all
    d4rl.py              D4RL's original files into Minari datasets; parsed by d4rl_hdf5.py
    guard.py             a child process for parsing what others wrote
    store.py             EpisodeStore: all episodes end to end, validated
    packed.py            the store as checksummed, memory-mapped files beside its dataset
    sampling.py          Batch, and the two ways to draw one: windows and streams
"""
