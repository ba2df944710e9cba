"""From --data_path to batches on the device.

archives       Local tar and zip files, read at random through an index.
arrays         Files whose values are not 8-bit colours: TIFF, 16-bit PNG and PGM, NumPy, DICOM.
batches        Loaders (processes or threads), and batches copied to the device ahead of time.
cache          Packed cache of resized images: format and reading. `util/cache.py` builds it.
decode         Decoding: one image file, recognised by its content -> upright bands of 8-bit pixels.
folders        Image folders: images and what is left out, splits, classes; the interface of every image source.
masks          Images with segmentation masks: folders, decoding of masks, crops of both.
pixels         Pixels: values as stored -> 8-bit bands, by --bands, --value_range and --alpha.
ranges         The value range of a data set, decided by a sample of its images.
samplers       Samplers: which images a rank loads, and in which order.
samples        Samples: the images of a source, decoded, cropped and stacked to parts of a batch.
sources        Image sources: what --data_path names, and subsets of the labelled training images.
streams        Tar shards read sequentially: from http, a pipe, or compressed files.
tables         Lists and tables of images, and images stored in parquet files.
timeouts       Time limit for reading from a disk that does not answer.
transforms     Transforms: crops for training and evaluation, normalisation on the device.
"""
