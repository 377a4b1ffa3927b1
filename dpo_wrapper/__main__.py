from dpo_wrapper.cli import main

main()
