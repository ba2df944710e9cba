"""From --data_path to batches on the device.

batches        From image sources to batches on the device.
cache          Packed cache of resized images: reading.
decode         One image file -> bands of 8-bit pixels, upright.
folders        Image folders, with and without classes.
sources        The image source that --data_path names.
streams        Tar shards read from front to back, from http or a pipe.
tars           Uncompressed tar shards on this machine, read at random through an index.
timeouts       Time limits for reads from a disk that does not answer.
transforms     Crops, resizing and normalisation.
"""
