"""An example of a family, to copy: a small convolutional network that predicts noise and reads two sequences of text.

This file is all that the rest of the program knows of it before it is used; ``family.py`` is what it does. Nothing else in the
package names it but the line in ``models/registry.py``; another package registers its own by an entry point instead.
"""

from dedistill.models.spec import Licence, ModelSpec, Published

SIDE = 64
SPEC = ModelSpec(
    name="example",
    family="dedistill.models.example.family:Example",
    networks={"ExampleNet": "dedistill.models.example.family:ExampleNet"},
    architecture="dedistill-example",
    folder="unet",
    prediction="epsilon",
    resolution=SIDE,
    defaults=lambda model: {"model.text_length": 16, "sample.height": SIDE, "sample.width": SIDE},
    published=(Published("dedistill/example-small", Licence("cc0-1.0"), "dedistill-example-small"),),
)
