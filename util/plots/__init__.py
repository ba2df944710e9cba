"""Image grids and charts.

charts         Line charts by matplotlib.
curves         Chart of pre-training runs from their log.jsonl: loss, gradient norm, kNN. `python -m util.plots.curves RUN... --output x.png`.
features       Image grids of an encoder: attention of the class token or of efficient probing, components of the patch features.
grids          Labelled grids of images.
reconstruction Image grids of the pre-training task: reconstruction, masks, low-pass filters.
segmentation   Image grids of a segmentation: image, mask, prediction, with a legend of the classes.
spectrum       Radial power spectrum of images and its chart.
"""
