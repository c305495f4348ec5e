from medusa_apar.finetune.train import main

if __name__ == "__main__":
    main()
