"""All mutations."""

from tests.mutants import laws, losses
from tests.mutants.mutation import Mutation

MUTATIONS: list[Mutation] = [*laws.ALL, *losses.ALL]
