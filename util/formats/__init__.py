"""Weight files of this project and of other repositories.

commands       Commands that load a converted file.
configs        Configuration files of timm and transformers folders.
initial        Initial weights of a pre-training run from a checkpoint: resampled, adapted to other channels, and reported.
keys           Tensor names of MAE, OpenMMLab and transformers side by side, and their shapes.
onnx           ONNX graphs of an encoder.
read           Weights of a checkpoint of any supported repository.
resize         Image size of a checkpoint, and its position embedding at another size.
unpickle       Loading of the content of a checkpoint file without executing code in it.
weights        Tensors of a checkpoint and the settings that its file states.
write          Weights in the file formats of other repositories.
"""
