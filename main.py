"""The paper's command line: a thin door to the stages of `codedinvnet`.

python ./main.py --config_file configs/mnist.json
python ./main.py --config_file configs/mnist.json -fusion --nactors 2 -sample_fusion
python ./main.py --config_file configs/mnist.json -fusion --nactors 2
python ./main.py --config_file configs/mnist.json -fusion --nactors 2 -test_fusion
"""

import sys

from codedinvnet.cli import paper_main

if __name__ == "__main__":
    sys.exit(paper_main())
