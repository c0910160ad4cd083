"""Which values hand-written kernels make: one matcher for each kind, the first that fits."""

from pcc.backends.cuda.patterns.attention import attention
from pcc.backends.cuda.patterns.eva import eva
from pcc.backends.cuda.patterns.gates import gate
from pcc.backends.cuda.patterns.lookups import lookup
from pcc.backends.cuda.patterns.norms import norm
from pcc.backends.cuda.patterns.products import product
from pcc.backends.cuda.piece import Matcher

MATCHERS: tuple[Matcher, ...] = (attention, eva, gate, lookup, norm, product)
