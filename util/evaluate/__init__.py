"""Evaluation of pre-trained encoders.

classifier     classifier.pth: writing a trained classifier, evaluating a saved one.
encoder        Encoders with the weights of a checkpoint, and their features.
health         Checks of a pre-training run: example images before the first step, loss against a constant prediction.
knn            Weighted k-nearest-neighbour accuracy of an encoder.
probes         Linear and attentive probes on a frozen encoder.
robustness     Classifiers on ImageNet-A, -R, -Sketch and -C.
scores         Accuracy of classifiers, exact over all ranks.
segmentation   Semantic segmentation: linear heads, patch neighbours, DPT; sliding windows and IoU.
"""
