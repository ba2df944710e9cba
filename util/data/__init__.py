"""From --data_path to batches on the device.

batches        Loaders (processes or threads), and batches copied to the device ahead of time.
cache          Packed cache of resized images: format and reading. `util/cache.py` builds it.
decode         Decoding: one image file -> upright bands of 8-bit pixels.
folders        Image folders, with and without classes, and the interface of every image source.
masks          Images with segmentation masks: folders, decoding of masks, crops of both.
samplers       Samplers: which images a rank loads, and in which order.
samples        Samples: the images of a source, decoded, cropped and stacked to parts of a batch.
sources        Image sources: what --data_path names, and subsets of the labelled training images.
streams        Streamed tar shards, read sequentially from http or a pipe.
tars           Local, uncompressed tar shards, read at random through an index.
timeouts       Time limit for reading from a disk that does not answer.
transforms     Transforms: crops for training and evaluation, normalisation on the device.
"""
