"""Jobs of finance, each on honest splits, beside its rivals, and ready to be deployed.

    result = pymeta.finance.volatility("prices.npz")
    print(result)                  # the comparison, in words and tables
    result.save("out")             # and what is deployed
    model = pymeta.finance.Deployed.load("out")

or `pymeta finance volatility --data prices.npz --out out`. Needs the extra `finance`.
"""

from pymeta.data.optional import need

need("torch", "pymeta.finance", "finance")
need("sklearn", "pymeta.finance", "finance")

from pymeta.finance.deployed import Deployed  # noqa: E402
from pymeta.finance.double_adapt import DoubleAdapt  # noqa: E402
from pymeta.finance.hedge_ratios import HedgeRatios  # noqa: E402
from pymeta.finance.intents import Intents  # noqa: E402
from pymeta.finance.jobs.allocation import allocation  # noqa: E402
from pymeta.finance.jobs.betas import betas, betas_panel  # noqa: E402
from pymeta.finance.jobs.credit import credit  # noqa: E402
from pymeta.finance.jobs.fraud import fraud, fraud_panel  # noqa: E402
from pymeta.finance.jobs.text import text  # noqa: E402
from pymeta.finance.jobs.trend import trend, trend_panel  # noqa: E402
from pymeta.finance.jobs.volatility import volatility, volatility_panel  # noqa: E402
from pymeta.finance.loans import loans_panel  # noqa: E402
from pymeta.finance.prices import Prices, read_prices  # noqa: E402
from pymeta.finance.remainder import Remainder  # noqa: E402
from pymeta.finance.result import Result  # noqa: E402
from pymeta.finance.walk import Walking  # noqa: E402

__all__ = [
    "Deployed",
    "DoubleAdapt",
    "HedgeRatios",
    "Intents",
    "Prices",
    "Remainder",
    "Result",
    "Walking",
    "allocation",
    "betas",
    "betas_panel",
    "credit",
    "fraud",
    "fraud_panel",
    "loans_panel",
    "read_prices",
    "text",
    "trend",
    "trend_panel",
    "volatility",
    "volatility_panel",
]
