#!/usr/bin/env bash
# The whole story on real digits, installation included; from then on the same as: dedistill demo [digits|mnist]
#
#   bash launch/demo.sh          8x8 digits of scikit-learn, under 5 minutes on 2 cores after installation
#   bash launch/demo.sh mnist    28x28 digits of MNIST, under 30 minutes
#
# Run again to continue after a stop; what is finished is reused.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python -m dedistill demo "$@"
