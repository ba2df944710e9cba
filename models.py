"""Every encoder by name, as --model knows them. A new host is one file beside these, and one line here."""

import models_convmae
import models_mff
import models_pixmim

ENCODERS = models_pixmim.ENCODERS | models_convmae.ENCODERS | models_mff.ENCODERS
